"""What several tests of the core share: small models, and dense float64 references that use none of the library."""
