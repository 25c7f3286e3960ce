"""From a spec to a finished run: checks, backends, the run directory, going on after a kill."""
