"""Where workers are: a map with time-to-live, without authority. The controller serves it; losing it loses nothing."""
