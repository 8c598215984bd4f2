"""Text in and out of token ids: torch-free, used by the offline API and by the router."""
