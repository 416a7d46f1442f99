"""Ways of quantising beside bitsandbytes and torch's dynamic INT8: a registry says where each is found."""
