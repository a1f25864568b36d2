"""Questions answered by many runs: `python -m sweeps run FILE`.

A sweep file states hypothesis, budget, seeds and stopping rule and builds one `Sweep`. The machinery is
`definition` (what a sweep is), `plan` (what it will cost), `study` (its state in Optuna), `trials` (one
training process each), `run` (the loop), `statistics` and `report` (what came out).
"""
