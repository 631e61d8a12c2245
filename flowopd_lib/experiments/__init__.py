"""What the notebooks ask: interference, several rewards, gradient estimators, the claims."""
