"""Why a model is as good as it is: TIDE errors, label errors, the evaluation report."""
