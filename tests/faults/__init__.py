"""Fault drills: real runs whose processes, links and files are broken at random instants."""
