"""Processes that compute together: they meet through the broker, and their arrays go straight from one to another."""
