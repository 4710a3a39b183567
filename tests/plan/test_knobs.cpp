// Plans as text: every setting reads back as it is written, and what cannot be read says why.
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>

#include "sim/base/error.h"
#include "sim/plan/plan.h"
#include "tests/error_of.h"

namespace mop::plan {
namespace {

std::string parse_error(const std::string& text) {
  return error_of([&] { parse_plan(text); });
}

// Values of every knob in canonical text; the first is the default of both families that have it.
const std::map<std::string, std::vector<std::string>>& values() {
  static const std::map<std::string, std::vector<std::string>> all{
      {"ep", {"auto", "1", "8", "96", "1K"}},
      {"reduce", {"bf16", "fp32"}},
      {"clip", {"on", "off"}},
      {"windows", {"on", "off"}},
      {"tp", {"1", "auto", "8"}},
      {"cp", {"1", "auto", "16"}},
      {"replicate", {"1", "auto", "2"}},
      {"cp-balance", {"on", "off"}},
      {"recompute", {"full", "none", "auto"}},
      {"reshard", {"on", "off"}},
      {"prefetch", {"on", "off"}},
      {"loss-chunk", {"4K", "0", "1000", "8K"}},
      {"offload", {"off", "on", "auto"}},
      {"runtime", {"eager", "compiled", "native"}},
      {"dense-shard", {"auto", "8", "96"}},
      {"ulysses", {"auto", "1", "32"}},
      {"expert-placement", {"inside", "across"}},
      {"vp", {"auto", "8"}},
      {"vp-scheme", {"auto", "weights", "tokens"}},
      {"vp-tile", {"1K", "512", "3000"}},
      {"mla-exchange", {"auto", "expanded", "latent"}},
      {"head-chunks", {"1", "4"}},
      {"save-attention", {"on", "off"}},
      {"kept-layers", {"auto", "0", "1", "12"}},
      {"checkpoints", {"auto", "hbm", "host"}},
      {"optimizer", {"auto", "hbm", "host", "stream", "split"}},
      {"optimizer-hbm-layers", {"0", "12"}},
      {"optimizer-staged-layers", {"0", "12"}},
      {"least-loaded", {"on", "off"}},
      {"capacity-factor", {"1", "1.25", "0.5"}},
      {"spill-min-rows", {"1K", "1", "333"}},
      {"spill-gate", {"1.3", "2", "inf"}},
      {"spill-slots", {"2", "1", "5"}},
      {"round-rows", {"auto", "8K", "1000"}},
  };
  return all;
}

std::vector<Knob> knobs_of(Family family) {
  std::vector<Knob> all;
  for (const Knob& k : knobs())
    if (family == Family::mop ? k.mop : k.fsdp2) all.push_back(k);
  return all;
}

TEST(Knobs, TwiceOrWithoutValueIsAnError) {
  const auto message = [](const char* text) {
    try {
      parse_plan(text);
    } catch (const UserError& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(message("mop:ep=8,ep=4"), "plan 'mop:ep=8,ep=4': ep is given twice");
  EXPECT_EQ(message("mop:ep=8,"), "plan 'mop:ep=8,': '' has no value; write setting=value");
  EXPECT_EQ(message("mop:ep=abc"), "plan setting ep is 'abc': not a size; write it like 4096, 128K or 1M");
}

TEST(Knobs, EachIsKnownHereAndDocumented) {
  std::set<std::string> names;
  for (const Knob& k : knobs()) {
    EXPECT_TRUE(values().contains(k.name)) << k.name << " has no test values";
    EXPECT_TRUE(names.insert(k.name).second) << k.name << " is there twice";
    EXPECT_TRUE(k.fsdp2 || k.mop) << k.name;
    EXPECT_GT(std::string(k.help).size(), 10u) << k.name;
    EXPECT_GT(std::string(k.values).size(), 5u) << k.name;
    EXPECT_EQ(&knob(k.name), &k);
  }
  EXPECT_EQ(names.size(), values().size());
}

TEST(Knobs, EveryValueReadsBackAsWritten) {
  for (const Family family : {Family::fsdp2, Family::mop}) {
    for (const Knob& k : knobs_of(family)) {
      for (const std::string& value : values().at(k.name)) {
        const std::string text = std::string(family_name(family)) + ":" + k.name + "=" + value;
        const Plan plan = parse_plan(text);
        EXPECT_EQ(plan.family, family);
        EXPECT_EQ(k.get(plan), value) << text;
        const bool standard = k.get(parse_plan(family_name(family))) == value;
        EXPECT_EQ(describe(plan), standard ? family_name(family) : text);
        // Nothing else has changed.
        for (const Knob& other : knobs_of(family)) {
          if (std::string(other.name) == k.name) continue;
          EXPECT_EQ(other.get(plan), other.get(parse_plan(family_name(family))))
              << text << " changed " << other.name;
        }
      }
    }
  }
}

TEST(Knobs, DefaultsAreTheFirstValues) {
  for (const Family family : {Family::fsdp2, Family::mop})
    for (const Knob& k : knobs_of(family)) {
      const bool plain_ep = family == Family::fsdp2 && std::string(k.name) == "ep";
      EXPECT_EQ(k.get(parse_plan(family_name(family))), plain_ep ? "1" : values().at(k.name).front())
          << k.name;
    }
}

TEST(Knobs, RandomPlansRoundTrip) {
  std::mt19937_64 random(5);
  for (int i = 0; i < 500; ++i) {
    const Family family = random() % 2 == 0 ? Family::fsdp2 : Family::mop;
    Plan plan = parse_plan(family_name(family));
    std::map<std::string, std::string> set;
    for (const Knob& k : knobs_of(family)) {
      if (random() % 3 != 0) continue;
      const auto& choices = values().at(k.name);
      set_knob(plan, k.name, set[k.name] = choices[random() % choices.size()]);
    }
    const std::string text = describe(plan);
    const Plan again = parse_plan(text);
    EXPECT_EQ(describe(again), text);
    for (const Knob& k : knobs_of(family)) EXPECT_EQ(k.get(again), k.get(plan)) << text << " " << k.name;
    for (const auto& [name, value] : set) EXPECT_EQ(knob(name).get(again), value) << text;
  }
}

TEST(Knobs, SpellingsOfTheSameValue) {
  for (const char* yes : {"on", "true", "1"}) EXPECT_TRUE(parse_plan(std::string("mop:clip=") + yes).clip);
  for (const char* no : {"off", "false", "0"}) EXPECT_FALSE(parse_plan(std::string("mop:clip=") + no).clip);
  EXPECT_EQ(parse_plan("mop:ep=0").expert, 0);
  EXPECT_EQ(parse_plan("mop:round-rows=16384").round_rows, 16384);
  EXPECT_EQ(describe(parse_plan("mop:round-rows=8192")), "mop:round-rows=8K");
  EXPECT_EQ(describe(parse_plan("fsdp2:ep=16,cp=16,offload=on")), "fsdp2:ep=16,cp=16,offload=on");
  EXPECT_EQ(describe(parse_plan("fsdp2:offload=on,cp=16,ep=16")), "fsdp2:ep=16,cp=16,offload=on");
}

TEST(Knobs, ResolvedMeansNothingIsLeftOpen) {
  EXPECT_TRUE(parse_plan("fsdp2").resolved());
  for (const char* open :
       {"fsdp2:tp=auto", "fsdp2:cp=auto", "fsdp2:ep=auto", "fsdp2:replicate=auto", "fsdp2:offload=auto"})
    EXPECT_FALSE(parse_plan(open).resolved()) << open;
  const std::string whole =
      "mop:ep=8,dense-shard=8,ulysses=1,vp=8,vp-scheme=tokens,mla-exchange=latent,checkpoints=hbm,optimizer="
      "hbm";
  EXPECT_TRUE(parse_plan(whole).resolved());
  for (const char* knob_name :
       {"ep", "dense-shard", "ulysses", "vp", "vp-scheme", "mla-exchange", "checkpoints", "optimizer"}) {
    Plan open = parse_plan(whole);
    set_knob(open, knob_name, "auto");
    EXPECT_FALSE(open.resolved()) << knob_name;
  }
}

TEST(Knobs, UnknownFamiliesAndSettingsSuggest) {
  EXPECT_EQ(parse_error("fsdp"), "unknown plan 'fsdp'; did you mean 'fsdp2'?; known: fsdp2, mop");
  EXPECT_EQ(parse_error("mob:ep=8").substr(0, 38), "unknown plan 'mob'; did you mean 'mop'");
  EXPECT_NE(parse_error("").find("unknown plan ''"), std::string::npos);
  EXPECT_NE(parse_error("mop:ulyses=8").find("unknown plan setting 'ulyses'; did you mean 'ulysses'?"),
            std::string::npos);
  EXPECT_NE(parse_error("mop:=8").find("unknown plan setting ''"), std::string::npos);
  EXPECT_EQ(parse_error("mop:ep"), "plan 'mop:ep': 'ep' has no value; write setting=value");
  EXPECT_EQ(parse_error("mop:ep=8,vp"), "plan 'mop:ep=8,vp': 'vp' has no value; write setting=value");
}

TEST(Knobs, SettingsOfTheOtherFamilyAreRefused) {
  for (const Family family : {Family::fsdp2, Family::mop}) {
    Plan plan = parse_plan(family_name(family));
    for (const Knob& k : knobs()) {
      if (family == Family::mop ? k.mop : k.fsdp2) continue;
      EXPECT_EQ(error_of([&] { set_knob(plan, k.name, values().at(k.name).front()); }),
                std::string("plan setting ") + k.name + " belongs to " +
                    (family == Family::mop ? "fsdp2" : "mop") + ", not to " + family_name(family) +
                    "; see 'mop show plan --help'");
    }
  }
}

TEST(Knobs, BadValuesSayWhatIsTaken) {
  EXPECT_EQ(parse_error("mop:clip=maybe"), "plan setting clip is 'maybe': it takes on or off");
  EXPECT_EQ(parse_error("mop:reduce=fp16"), "plan setting reduce is 'fp16': it takes bf16 or fp32");
  EXPECT_EQ(parse_error("mop:optimizer=cpu"),
            "plan setting optimizer is 'cpu': it takes auto, hbm, host, stream or split");
  EXPECT_EQ(parse_error("fsdp2:recompute=some"),
            "plan setting recompute is 'some': it takes auto, none or full");
  for (const char* bad : {"0", "-1", "nan", "fast", "", "1.3x", " 1"})
    EXPECT_EQ(parse_error(std::string("mop:spill-gate=") + bad),
              "plan setting spill-gate is '" + std::string(bad) + "': it takes a number above 0");
  // Every knob refuses what is no value of any.
  for (const Family family : {Family::fsdp2, Family::mop})
    for (const Knob& k : knobs_of(family))
      for (const char* bad : {"", "?", "-1", "on off", "1.5.5"})
        EXPECT_NE(error_of([&] {
                    Plan plan = parse_plan(family_name(family));
                    set_knob(plan, k.name, bad);
                  }),
                  "")
            << k.name << "=" << bad;
  for (const char* bad :
       {"mop:ep=-4", "mop:ep=1.5", "mop:vp-tile=0", "mop:head-chunks=0", "mop:round-rows=-1",
        "mop:spill-slots=0", "fsdp2:loss-chunk=-1", "mop:ep=99999999999999999999"})
    EXPECT_NE(parse_error(bad), "") << bad;
}

}  // namespace
}  // namespace mop::plan
