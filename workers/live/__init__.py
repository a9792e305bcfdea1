"""Live indexes: changed while they are searched, durable, merged in the background, upon what workers/index serves."""
