"""The options of each verb as one frozen value: defaults, limits, help. No torch."""
