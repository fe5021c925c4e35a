"""Items through deployments of models that are no language models: vectors of texts, scores of pictures."""
