"""Commands beside training: each module has `main(arguments) -> exit code` and imports no Lightning."""
