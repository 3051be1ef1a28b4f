"""What is left when the agent is taken from the cluster."""
