"""From a policy's score to a setting whose loss is bounded, and the certificate that says so."""
