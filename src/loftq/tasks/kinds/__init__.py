"""How each kind of task turns rows into features, predictions and scores."""
