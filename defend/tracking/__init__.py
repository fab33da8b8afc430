"""Evidence for a reviewer who did not train the model: MLflow runs, figures, a card."""
