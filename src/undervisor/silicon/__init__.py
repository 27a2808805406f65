"""The processor we run on: Unicorn's TCG with AMD SVM and nested paging, behind a small interface.

All knowledge of Unicorn's insides is in this package and checked at start-up.
"""
