/* pykvm_guest.h: what a freestanding guest in C needs to say something and to end.
 *
 * The convention all guests of pykvm share:
 *   - a byte written to port 0xe9 goes to the console;
 *   - a byte written to port 0xf4 ends the run, and is its exit code;
 *   - the host enters in 64-bit mode with RAM identity-mapped, and leaves nothing but that.
 *
 * Write `int main(void)`; what it returns becomes the exit code. Build with
 * pykvm.guestlib.build_c(), or with the Makefile beside guests/c-guest/main.c.
 *
 * Everything works in ring 0 and, with IOPL 3, in ring 3, where it runs at native speed on every
 * KVM. There is no floating point: gcc is told to use general registers only.
 */
#ifndef PYKVM_GUEST_H
#define PYKVM_GUEST_H

#include <stddef.h>
#include <stdint.h>

#define GUEST_CONSOLE_PORT 0xe9
#define GUEST_EXIT_PORT 0xf4

/* ---- ports and memory-mapped I/O: each access is one exit to the host ---- */

static inline void outb(uint16_t port, uint8_t value)
{
	__asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline void outw(uint16_t port, uint16_t value)
{
	__asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline void outl(uint16_t port, uint32_t value)
{
	__asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline uint8_t inb(uint16_t port)
{
	uint8_t value;
	__asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static inline uint16_t inw(uint16_t port)
{
	uint16_t value;
	__asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static inline uint32_t inl(uint16_t port)
{
	uint32_t value;
	__asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

/* One MOV of exactly this width, which KVM can decode: the compiler may neither split nor merge it. */
static inline uint32_t mmio_read32(uintptr_t gpa)
{
	uint32_t value;
	__asm__ volatile("movl (%1), %0" : "=r"(value) : "r"(gpa) : "memory");
	return value;
}

static inline void mmio_write32(uintptr_t gpa, uint32_t value)
{
	__asm__ volatile("movl %0, (%1)" : : "r"(value), "r"(gpa) : "memory");
}

/* ---- the end ---- */

/* End the run with an exit code from 0 to 255. Ring 3 has no HLT: if the host goes on, try again. */
static inline _Noreturn void guest_exit(int code)
{
	for (;;)
		outb(GUEST_EXIT_PORT, (uint8_t)code);
}

/* ---- the console ---- */

static inline void print_char(char c)
{
	outb(GUEST_CONSOLE_PORT, (uint8_t)c);
}

static inline void print(const char *text)
{
	while (*text)
		print_char(*text++);
}

static inline void print_dec(uint64_t value)
{
	char digits[20]; /* 2^64 has 20 */
	int n = 0;

	do {
		digits[n++] = (char)('0' + value % 10);
		value /= 10;
	} while (value);
	while (n)
		print_char(digits[--n]);
}

static inline void print_hex(uint64_t value)
{
	print("0x");
	for (int shift = 60; shift >= 0; shift -= 4)
		print_char("0123456789abcdef"[value >> shift & 15]);
}

/* End with exit code 1 and the place, if something that must hold does not. */
#define guest_assert(condition)                                                                    \
	do {                                                                                       \
		if (!(condition)) {                                                                \
			print("assertion failed: " #condition ", " __FILE__ ":");                  \
			print_dec(__LINE__);                                                       \
			print_char('\n');                                                          \
			guest_exit(1);                                                             \
		}                                                                                  \
	} while (0)

/* gcc may call these four even in freestanding code (GCC manual, "Standards"): runtime.c has them. */
void *memcpy(void *restrict to, const void *restrict from, size_t size);
void *memmove(void *to, const void *from, size_t size);
void *memset(void *to, int byte, size_t size);
int memcmp(const void *a, const void *b, size_t size);

int main(void);

#endif
