"""What `ralmq bench` runs: measurements of this machine, as ratios. Knows the client's API and processes."""
