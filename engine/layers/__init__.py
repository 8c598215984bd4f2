"""The layers that models are made of. Their results for a token do not depend on the batch around it."""
