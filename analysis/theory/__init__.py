"""Section 4 and Appendix K: when a soup of two models is better than their ensemble."""
