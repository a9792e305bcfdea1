"""Text to vectors: `embed:<name>` over an encoder of the BERT family. Imported only where one is served."""
