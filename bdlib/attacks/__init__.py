"""Attacks: what an attacker makes with data, networks and training, beyond a trigger that a seed gives."""
