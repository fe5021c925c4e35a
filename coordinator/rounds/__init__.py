"""Fine-tuning in rounds: who takes part, how much airtime each gets, what of a privacy budget is spent."""
