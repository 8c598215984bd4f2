"""The engine: what one worker computes. It knows no network; see ARCHITECTURE in docs/ for its shape."""
