"""Who takes which layers: sizes and speeds in, spans out. Pure: knows no file, socket, clock, torch or numpy."""
