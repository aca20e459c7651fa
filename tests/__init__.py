"Tests of plumbing/ and extras/, a file for each room; those of the lessons are in test_all.py."
import pytest

pytest.register_assert_rewrite("tests.helpers")  # before anything imports it: a failed assert in it shows its values
