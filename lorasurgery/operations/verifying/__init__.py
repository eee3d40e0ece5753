"""What verify is made of: what a merged model should hold, each tensor measured, the verdict and why."""
