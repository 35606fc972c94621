"""memsave's adapters as PEFT tuners; importing this package makes them known to PEFT."""
