"""Floor 3. OCI distribution: HTTP pools, tokens, credentials, ranges, referrers, push."""
