"""Who starts them: processes of this machine, supervised, ended in order. Knows no message but `ralmq.status`."""
