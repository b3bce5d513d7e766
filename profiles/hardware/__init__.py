"""What devices there are: discovery, known devices, leases, measurements, and what slows them down."""
