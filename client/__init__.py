"""Who asks: the link to the broker and the asynchronous API over it. Knows no torch, no faiss, no worker."""
