"""So that tests in folders below find `small_guests`."""
