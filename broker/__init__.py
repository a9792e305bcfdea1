"""Who decides: which worker serves which request. Knows no torch, no worker class; only server.py knows a socket."""
