"""The router: HTTP in, a decode worker and sources chosen, tokens out. No torch, no ray."""
