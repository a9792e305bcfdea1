"""The embedded checkpoint, how it was trained, and what `ralmq demo` runs."""
