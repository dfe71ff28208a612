"""A whole study by one call: merges and their controls made, verified, measured, compared and reported."""
