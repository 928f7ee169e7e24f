"""The paper's figures: what each needs to be run, and how it is drawn."""
