"""Recipes that train the shipped encoders, and the check of the figures on their cards."""
