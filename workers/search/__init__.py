"""The worker `index`: what serves `search:<name>`, whichever kind of index it is."""
