"""What plugins and the OpenRLHF adapter hand each other."""
