"""Random projection for influence functions: the published experiments and what they leave out.

Source: "A Unified Theory of Random Projection for Influence Functions", arXiv 2602.10449.
"""
