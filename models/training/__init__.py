"""Training on torch: frozen weights as they are packed, adapters beside them. Nobody else imports torch for this."""
