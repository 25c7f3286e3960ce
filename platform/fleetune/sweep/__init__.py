"""Many runs from one file: what is to be tried, on Ray Tune, with a table of how each trial came out."""
