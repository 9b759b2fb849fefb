"""From the bundled teacher to an evaluated hybrid in minutes on a CPU: `run.run_quickstart`."""
