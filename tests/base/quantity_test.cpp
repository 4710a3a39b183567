#include "sim/base/quantity.h"

#include <gtest/gtest.h>

#include <limits>
#include <random>

#include "sim/base/error.h"
#include "tests/error_of.h"

namespace mop {
namespace {

std::string count_error(std::string_view text) {
  return error_of([&] { parse_count(text, "context"); });
}

std::string bytes_error(std::string_view text) {
  return error_of([&] { parse_bytes(text, "buffer"); });
}

TEST(ParseCount, ReadsNumbersAndBinaryUnits) {
  EXPECT_EQ(parse_count("1", "x"), 1);
  EXPECT_EQ(parse_count("4096", "x"), 4096);
  EXPECT_EQ(parse_count("128K", "x"), 131072);
  EXPECT_EQ(parse_count("1M", "x"), 1048576);
  EXPECT_EQ(parse_count("2G", "x"), int64_t{2} << 30);
  EXPECT_EQ(parse_count("1.5K", "x"), 1536);
  EXPECT_EQ(parse_count("1e3", "x"), 1000);
  EXPECT_EQ(parse_count("007", "x"), 7);
}

TEST(ParseCount, RefusesZeroAndNegative) {
  EXPECT_EQ(count_error("0"), "context is '0': it must be greater than zero");
  EXPECT_EQ(count_error("0K"), "context is '0K': it must be greater than zero");
  EXPECT_EQ(count_error("-1"), "context is '-1': it must be greater than zero");
  EXPECT_EQ(count_error("-4K"), "context is '-4K': it must be greater than zero");
}

TEST(ParseCount, RefusesWhatIsNoWholeNumber) {
  EXPECT_EQ(count_error("1.5"), "context is '1.5': it must be a whole number");
  EXPECT_EQ(count_error("0.3K"), "context is '0.3K': it must be a whole number");
  EXPECT_EQ(count_error("1e-3"), "context is '1e-3': it must be a whole number");
}

TEST(ParseCount, RefusesWhatOverflows) {
  EXPECT_EQ(count_error("9223372036854775808"),
            "context is '9223372036854775808': too large, the limit is 2^63");
  EXPECT_EQ(count_error("9000000000G"), "context is '9000000000G': too large, the limit is 2^63");
  EXPECT_EQ(count_error("1e400"), "context is '1e400': too large, the limit is 2^63");
}

TEST(ParseCount, RefusesWhatIsNoSize) {
  for (const char* text :
       {"",    " ",     "K",    "abc", "4k",  "4 K",      " 4",   "4 ", "+4",  "4KB", "4KiB",
        "4K4", "4,096", "0x10", "nan", "inf", "infinity", "-inf", "4T", "--4", "1e",  "4\n"}) {
    SCOPED_TRACE(text);
    const std::string expected =
        "context is '" + std::string(text) + "': not a size; write it like 4096, 128K or 1M";
    try {
      parse_count(text, "context");
      ADD_FAILURE() << "accepted";
    } catch (const UserError& error) {
      EXPECT_EQ(std::string(error.what()), expected);
    }
  }
}

TEST(ParseBytes, ReadsBinaryAndDecimalUnits) {
  EXPECT_EQ(parse_bytes("4096", "x"), 4096);
  EXPECT_EQ(parse_bytes("4096B", "x"), 4096);
  EXPECT_EQ(parse_bytes("1KiB", "x"), 1024);
  EXPECT_EQ(parse_bytes("512MiB", "x"), int64_t{512} << 20);
  EXPECT_EQ(parse_bytes("16GiB", "x"), 17179869184);
  EXPECT_EQ(parse_bytes("16GB", "x"), 16000000000);
  EXPECT_EQ(parse_bytes("1TB", "x"), 1000000000000);
  EXPECT_EQ(parse_bytes("1.5TiB", "x"), 1649267441664);
  EXPECT_EQ(parse_bytes("2KB", "x"), 2000);
  EXPECT_EQ(parse_bytes("3MB", "x"), 3000000);
  EXPECT_EQ(parse_bytes("0.5KiB", "x"), 512);
}

TEST(ParseBytes, Refuses) {
  EXPECT_EQ(bytes_error("0B"), "buffer is '0B': it must be greater than zero");
  EXPECT_EQ(bytes_error("-1GiB"), "buffer is '-1GiB': it must be greater than zero");
  EXPECT_EQ(bytes_error("1.5B"), "buffer is '1.5B': it must be a whole number");
  EXPECT_EQ(bytes_error("9300000TiB"), "buffer is '9300000TiB': too large, the limit is 2^63");
  for (const char* text : {"", "16Gib", "16gb", "16G", "128K", "16 GiB", "GiB", "16GiBs"})
    EXPECT_EQ(bytes_error(text),
              "buffer is '" + std::string(text) + "': not a size; write it like 4096, 512MiB or 16GiB");
}

TEST(FormatCount, ReadsBackToTheSameValue) {
  std::mt19937_64 random(1);
  for (int i = 0; i < 2000; ++i) {
    const int64_t count = static_cast<int64_t>(1 + random() % 5000)
                          << (i % 3 * 10);  // whole numbers of 1, K and M
    EXPECT_EQ(parse_count(format_count(count), "x"), count) << format_count(count);
  }
}

TEST(FormatCount, UsesUnitsOnlyWhereExact) {
  EXPECT_EQ(format_count(131072), "128K");
  EXPECT_EQ(format_count(131000), "131000");
  EXPECT_EQ(format_count(1048576), "1M");
  EXPECT_EQ(format_count(1 << 30), "1024M");
  EXPECT_EQ(format_count(1048577), "1048577");
  EXPECT_EQ(format_count(0), "0");
  EXPECT_EQ(format_count(-1024), "-1024");
}

TEST(FormatBytes, ChoosesTheUnit) {
  EXPECT_EQ(format_bytes(0), "0 B");
  EXPECT_EQ(format_bytes(1023), "1023 B");
  EXPECT_EQ(format_bytes(1024), "1.0 KiB");
  EXPECT_EQ(format_bytes(1.5 * 1024 * 1024), "1.5 MiB");
  EXPECT_EQ(format_bytes(119.0 * 1073741824), "119.0 GiB");
  EXPECT_EQ(format_bytes(2.25 * 1099511627776), "2.25 TiB");
  EXPECT_EQ(format_bytes(-2048), "-2.0 KiB");
}

TEST(FormatBytes, IsWithinItsLastDigit) {
  std::mt19937_64 random(2);
  for (int i = 0; i < 1000; ++i) {
    const int64_t bytes = static_cast<int64_t>(1 + (random() >> (18 + random() % 40)));
    std::string text = format_bytes(static_cast<double>(bytes));
    text.erase(text.find(' '), 1);
    double unit = 1;
    for (const auto& [suffix, factor] :
         {std::pair{"KiB", 1024.0}, {"MiB", 1048576.0}, {"GiB", 1073741824.0}, {"TiB", 1099511627776.0}})
      if (text.ends_with(suffix)) unit = factor;
    EXPECT_NEAR(std::stod(text) * unit, static_cast<double>(bytes), 0.0501 * unit) << text;
  }
}

TEST(FormatSeconds, ChoosesTheUnit) {
  EXPECT_EQ(format_seconds(3.1749), "3.17 s");
  EXPECT_EQ(format_seconds(1), "1.00 s");
  EXPECT_EQ(format_seconds(123.45), "123.5 s");
  EXPECT_EQ(format_seconds(0.0124), "12.40 ms");
  EXPECT_EQ(format_seconds(12e-6), "12.00 us");
  EXPECT_EQ(format_seconds(0), "0.00 us");
}

TEST(Ensure, NamesThePlaceAndTheInvariant) {
  EXPECT_NO_THROW(ensure(true, "fine"));
  try {
    ensure(false, "ranks divide experts");
    FAIL();
  } catch (const InternalError& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find("quantity_test.cpp"), std::string::npos) << message;
    EXPECT_NE(message.find("invariant broken: ranks divide experts"), std::string::npos) << message;
  }
}

}  // namespace
}  // namespace mop
