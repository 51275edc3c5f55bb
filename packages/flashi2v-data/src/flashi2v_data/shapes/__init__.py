"""Videos of moving shapes, made here, and what is to be seen in them."""
