"""(placeholder until the first room stands)"""
