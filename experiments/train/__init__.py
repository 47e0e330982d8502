"""The scale models and the learned predictor, trained."""
