"""What every other package may use: errors, T6_HOME, files, secrets, the console. Standard library and rich only."""
