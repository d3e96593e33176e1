"""What one looks at: the collapse monitor, recorded samples, further loggers, and the masking of credentials."""
