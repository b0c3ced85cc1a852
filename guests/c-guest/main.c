/* c-guest: a guest in C. It sieves for primes in guest memory and returns an exit code. */
#include "pykvm_guest.h"

#define LIMIT 1000000

static uint8_t composite[LIMIT]; /* .bss: not in the file, zeroed by the loader */

static uint32_t count_primes(void)
{
	uint32_t primes = 0;

	for (uint32_t n = 2; n < LIMIT; n++) {
		if (composite[n])
			continue;
		primes++;
		for (uint32_t multiple = 2 * n; multiple < LIMIT; multiple += n)
			composite[multiple] = 1;
	}
	return primes;
}

int main(void)
{
	uint32_t primes;

	print("Hello from C!\n");
	primes = count_primes(); /* millions of memory accesses, and not one exit */
	print("primes below ");
	print_dec(LIMIT);
	print(": ");
	print_dec(primes);
	print("\n");
	guest_assert(primes == 78498);
	return 0;
}
